//! The controller: decides which backend owns which bucket, and publishes the tables.
//!
//! State changes go one way: a command is *decided* against the state (pure, [`core`]), the resulting [`Change`]
//! is *stored* ([`store`]), then *applied* ([`model`]) and only then *published* ([`publish`]). So nothing that is
//! not on disk is ever seen by a node or answered to an operator.
//!
//! | module | what it holds |
//! |---|---|
//! | [`model`] | the state, and the change from one state to the next |
//! | [`planner`] | which buckets move to reach the weighted target with the fewest moves |
//! | [`chains`] | what moves, drain reports, deaths and re-basing do to a bucket's chain |
//! | [`core`], [`draft`] | commands → changes |
//! | [`leases`] | who is alive, from syncs and probes |
//! | [`publish`] | what a node is told, and when |
//! | [`store`] | the state on disk |
//! | [`hub`] | the one writer, and what readers share with it |
//! | [`sync`] | a node's sync |
//! | [`api`], [`answer`], [`views`], [`problem`] | HTTP |
//! | [`events`] | what happened lately |
//! | [`ctl`] | `daisyctl` |
//!
//! [`Change`]: model::Change
#![forbid(unsafe_code)]

pub mod answer;
pub mod api;
pub mod chains;
pub mod core;
pub mod ctl;
pub mod draft;
pub mod events;
pub mod hub;
pub mod leases;
pub mod model;
pub mod planner;
pub mod problem;
pub mod publish;
pub mod store;
pub mod sync;
pub mod views;
