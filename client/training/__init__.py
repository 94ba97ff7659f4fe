"""Training calls: hidden states forward and gradients backward over a route, done again where a peer fails.

micro_batches   `TrainingCalls`: a batch split by rows into micro-batches, in flight over all spans at once
hop             `Hops`: forward and backward of one hop, by chance verified
relay           `Relay`: all hops at once, each peer handing its result to the next
"""
