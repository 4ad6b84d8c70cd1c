"""File formats of Wan2.1 denoisers: where they lie, what they hold and call it, and how to write them."""
