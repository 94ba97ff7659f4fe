"""Being a member of a swarm, as peers, clients and bootstrap nodes are. Imports `protocol` only.

member         the whole of it under one life: joining, staying, leaving; start here
daemon         p2pd, the child process that is libp2p; addresses, ports, door: where a member can be reached
identity       who a member is: an RSA key and what it signs
directory      what peers announce, and looking it up, in a DHT (hivemind's)
neighbours     the members that one knows: the first contact, and finding them again
validator      which records may stand in the DHT: signed ones; storage: keeping them, within bounds
membership/    private swarms: what this machine knows of them, their gate, letting others in
joining        becoming a member of one, by a ticket
options        the command line options that every member has
"""
