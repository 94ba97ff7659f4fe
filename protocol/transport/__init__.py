"""The two carriers of streams behind one interface, `protocol.stream.Transport`.

carriers       the choice between the two, made for each connection
libp2p         streams through p2pd: NAT traversal, relays
direct         TLS connections to a peer's own port
certificate    a peer's TLS certificate, known by its hash
introduction   how the caller of a direct connection shows who it is
race           several ways to one connection, the first that is there taken
socket_stream  the stream itself, for both: reads right into the memory that is wanted
"""
