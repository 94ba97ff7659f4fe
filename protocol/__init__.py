"""What both ends of a connection must agree on. Imports no other room, and nothing here knows peers or clients.

swarm.proto    every message; swarm_pb2 is made of it by `python -m protocol.generate`
stream         what a carrier gives: ordered byte streams between two authenticated ends (transport/: the carriers)
channel        messages over a stream: a frame each, one request and one answer at a time
membership/    private swarms: certificates, and the handshake with which their streams begin
connections    open channels to peers of one model, greeted once and used again
tensors        tensors as bytes, checked before memory is taken for them; codecs: in fewer bytes
adapters       PEFT adapters as they travel; records: what peers announce in the directory
errors         errors that survive the wire; name: what the project is called
weights/       a model's files from other members: manifests, pieces, the cache, fetching
model/         what both ends must know of a Transformers model; machine/: this process on its machine
"""
