"""The only package that imports vLLM: taps in the worker, decisions in the scheduler, records in the API process."""
