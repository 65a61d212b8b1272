//! Scenarios and figures.
