"""What crosses the wire, and how: messages, tensors, records, errors, transports. Imports no other room."""
