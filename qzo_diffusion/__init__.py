"""Fine-tune models that are already quantized, by zeroth-order optimization of their quantization
scales.
"""

__version__ = "0.1.0"
