"""NPU-shaped ONNX graphs, written node by node from the parameter trees.

Static shapes, rank at most 4, opset 23, float32 weights in one external-data file, names that follow the parameter
tree. What an NPU does badly is done by the host: embedding look-ups, masks, rotary tables, positions, sinusoids,
patching. ``builder`` holds the graph under construction; one file per network; ``parity`` compares with JAX.
"""
