"""`/docs`: the API reference in a browser. Its scripts come from this service, and no other host is asked."""
