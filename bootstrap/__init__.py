"""Being a member of a swarm: identity, DHT node, directory of peers. Imports `protocol` only."""
