//! What muxes and agents share and `daisy-shared` may not do.
