//! Scenarios, figures and plots: the demo, and comparisons ([`bench`]).

#![forbid(unsafe_code)]

pub mod bench;
pub mod plot;
pub mod report;
pub mod scenario;
