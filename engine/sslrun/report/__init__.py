"""One self-contained page of what runs did and learned: `sslrun report`."""
