//! Topologies and traffic for the suites.
