//! The node's side: the node agent's socket, pod namespaces and sockets inside them.
