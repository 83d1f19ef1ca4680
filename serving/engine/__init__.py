"""vLLM: the only package that imports it. Taps in the worker, decisions in the scheduler, records in the API process."""
