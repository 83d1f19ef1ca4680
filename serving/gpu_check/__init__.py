"""What has to be true on a GPU, checked there: one run, two tiers, a report. The first tier needs torch alone."""

from probes.errors import TelltaleError

__all__ = ["GpuCheckError"]


class GpuCheckError(TelltaleError, RuntimeError):
    """The check cannot be run here; nothing was found out."""
