"""The parts of ``telltale bench``: two servers, the same load on both, paired figures. Imports no engine."""

from probes.errors import TelltaleError

__all__ = ["BenchError"]


class BenchError(TelltaleError, RuntimeError):
    """The benchmark cannot be run, or what it measured is void."""
