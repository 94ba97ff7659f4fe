"""Finding a private swarm's members on the networks that this machine is in, by DNS-SD over multicast DNS.

discovery      announces this member on every interface and looks for others; start here
announcement   what is announced: sealed, so that an outsider learns only that some swarm is there
networks       this machine's own networks: where what was found may be believed to be
"""
