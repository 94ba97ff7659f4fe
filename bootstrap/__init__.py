"""Being a member of a swarm, as peers, clients and bootstrap nodes are. Imports `protocol` only.

member         the whole of it under one life: joining, staying, leaving; start here
daemon         p2pd, the child process that is libp2p; addresses, ports, door: where a member can be reached
identity       who a member is: an RSA key and what it signs
directory      what peers announce, and looking it up, in a DHT (hivemind's)
neighbours     the members that one knows: the first contact, and finding them again
validator      which records may stand in the DHT: signed ones; storage: keeping them, within bounds
gate, seal     in a private swarm, the DHT's requests only between holders of the key
key_file       the file with a swarm's keys; private_files: writing files that hold a secret
options        the command line options that every member has
"""
