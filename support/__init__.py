"""What tests and benchmarks share: tiny models, pictures, an S3 server, whole runs as processes. Not in the wheel."""
