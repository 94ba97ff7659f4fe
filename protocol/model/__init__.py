"""What both ends must agree on about a model: which modules are its blocks, which checkpoint files hold what."""
