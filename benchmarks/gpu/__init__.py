"""The parts of ``benchmarks/on_gpu.py``, and the models that it and ``projection.py`` share."""
