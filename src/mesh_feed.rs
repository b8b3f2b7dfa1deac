//! The current mesh, published by the control thread and read by the workers.
