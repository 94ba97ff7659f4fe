"""Who is there, by which route, and who failed: what a client knows of a swarm. Asks peers for nothing but a greeting.

swarm        `Swarm`: this client's membership for one model; looks peers up, finds routes, keeps away from who failed
routes       `Hop`, and the cheapest chain of hops over a range of blocks
health       what using peers taught: bans, round trips, pace, who cannot reach whom
retries      the attempts at one piece of work: go round who failed, wait, give up
sessions     `OpenSessions`: those that lie idle give way before a peer has to refuse another
weights      a model by its name: that of this machine, the swarm's, or the hub's
membership   one p2pd for all models of this process in the same swarm
config       `SwarmConfig`, the options that users set
loop         the event loop in a thread of its own that all of the client's requests run on
"""
