"""Programs that publish events: data, training, matmul jobs, the gateway. They meet subscribers only in the catalog."""
