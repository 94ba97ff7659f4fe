"""One small interface (`base`), its two carriers (`libp2p`, `direct`), and the choice between them (`carriers`)."""
