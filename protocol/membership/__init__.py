"""Being a member of a private swarm, as both ends of a connection check it. No files, no network.

certificate    roles, and who says that a key has one: a chain of statements from the swarm's root; start here
secret         the swarm's shared secret, which hides it from strangers
refusals       why somebody is not let in: one sentence each
handshake      how the two ends of a stream show each other what they are
membership     the messages and statements (membership.proto)
"""
