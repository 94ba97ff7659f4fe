"""One small interface (`base`), and its carriers: libp2p streams (`libp2p`)."""
