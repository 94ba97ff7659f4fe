"""The two carriers of streams behind one interface, `protocol.stream.Transport`.

carriers       the choice between the two, made for each connection
libp2p         streams through p2pd: NAT traversal, relays
direct         TLS connections to a peer's own port
certificate    a peer's TLS certificate, known by its hash
introduction   how the caller of a direct connection shows who it is
dial_back      asking another member whether it can reach this one
race           several ways to one connection, the first that is there taken
socket_stream  the stream itself, for both: reads right into the memory that is wanted

Nobody chooses a carrier. A client that has read a peer's record tries the peer's door (`--direct-port`), tries libp2p
too if the door has not answered within 0.3 s, and takes what is up first. A door that failed is left alone for 5 s,
twice as long each time it fails again (at most 5 minutes), or until the peer announces another. `carrier="direct"` or
`"libp2p"` insists on one. Above the carriers nothing differs: both give a `SocketStream`, and both pass the same
tests.

- The peer makes a P-256 key and a certificate at every start. Its signed record has the certificate's SHA-256, and
  the caller takes no other. So nothing else of X.509 has to be right: not the name, not the time, not the clock.
- The caller introduces itself: the peer sends 32 random bytes, the caller signs them together with the peer's ID and
  the certificate's hash. The peer ID that quotas and the swarm's key rely on follows from its key, as on libp2p.
- A door is announced on addresses of this machine's own interfaces. Addresses of a router, or of `--announce`, lead
  to libp2p only, unless `--announce-direct /ip4/.../tcp/...` names the door there.
- Direct streams that are open outlive a p2pd that dies; the member joins anew meanwhile.

Why TLS streams and not gRPC: benchmarks/RESULTS.md, "Carriers".
"""
