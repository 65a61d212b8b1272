//! The end-to-end suites: real daemons, servers and clients in network namespaces.

mod tools;
