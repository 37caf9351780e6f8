"""The glue between the method and the orchestrator: storage, catalog, plan, Ray actors, manifest."""
