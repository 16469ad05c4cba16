"""Image captions by a guided decoder with attention."""
