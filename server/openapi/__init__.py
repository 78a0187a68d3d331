"""OpenAPI documents of both ports, made from what requests are read by."""
