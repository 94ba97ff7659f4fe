"""Speaking the wire: what clients send is read and checked here, queued for the compute thread, and answered.

`service` has the streams, and the table from a message's type to its handler. A message is read in the file that is
named after its group, as the folders that do the work are:

- `generation`: OpenSession, ForkSession, Step
- `training`: Forward, Backward
- `adapters`: PutAdapter
- `base_weights`: ReadWeight, Factorize
- `handover`: Push; waiting for what other peers push, and pushing results on
- `weights`: ReadManifest, ReadHoldings, ReadPiece

All streams come in by `entrance`, those about weights as well, which need no span.

`connection` is one client's stream, with signs of life while work is done for it. `reception` lets clients in, and
`quotas` says what one of them may have.
"""
