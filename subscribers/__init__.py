"""Apps that handle events: inference, gradient aggregation, matmul. They meet publishers only in the catalog."""
