"""`peer doctor`: why a machine cannot join, serve or use a swarm, found by checks that each say what to do about it.

examination     the list of checks, in order, and how it is gone through; start here
check           what a check is, and what it finds
case            what is examined: the machine, as a member of the swarm that is meant
machine         disk, memory, device
ports           p2pd, the ports to listen at
network         whether others can dial back, multicast, NAT
standing        the swarm: whether it answers, clocks, the certificate, versions
peers           those that give or serve the model: reachable by which carrier, how far away, how fast
report          what people and programs are shown

A new check is a function from a `Case` to `Finding`s, and a line in `examination.CHECKS`. What it looks for it does not
raise; whatever it does raise is a finding, too. No address is contacted but those of the swarm's members.
"""
