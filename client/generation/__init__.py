"""A generation: KV caches on the peers of a route, kept in step with what Transformers takes them for.

session       `InferenceSession`: takes each step through its stages, and puts all back where a step failed
step          `Step`: new tokens for the caches, or a chunk of them
stage         `Stage`: one hop's session on its peer; asks for a step, has it verified
pipeline      several requests in flight: a prompt in chunks, peers that hand their results to each other
replacement   other peers in the place of a stage that failed, is leaving or has become slow; they are told all it saw
history       what went into a stage, under the edits that the cache went through
past          what all stages share: positions, KV prefix, and how far each pass went where that matters
dynamic_rope  models whose keys depend on how far the trunk pass reached that made them
"""
