"""The demo world: scenes whose true colours and masks are known, and the small model trained on them."""
