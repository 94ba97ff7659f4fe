"""What a client may ask of the base weights, to initialise an adapter as it would on a model of its own.

- `norms`: row norms (DoRA), and finding the weight that a request names
- `factors`: leading factors of a weight (PiSSA, OLoRA)
- `dequantized`: a weight as plain floats, whatever form the span holds it in
"""
