//! The mux.
