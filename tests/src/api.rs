//! The controller's API, asked from inside a namespace.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::netns::Namespace;

/// A client of one controller.
#[derive(Clone, Debug)]
pub struct Api {
    base: String,
    token: String,
    agent: ureq::Agent,
}

impl Api {
    /// A client for the controller at `base` (a URL without a path), with this bearer token.
    pub fn new(base: &str, token: &str) -> Api {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(10)))
            // The body of a refusal says what is wrong.
            .http_status_as_error(false)
            // Every request comes from a thread that has entered the namespace: a kept connection gains little.
            .max_idle_connections(0)
            .build();
        Api { base: base.to_owned(), token: token.to_owned(), agent: config.into() }
    }

    /// The controller's URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Asks for a resource, from inside `namespace`.
    ///
    /// # Errors
    /// If the controller does not answer, or refuses.
    pub fn get(&self, namespace: &Namespace, path: &str) -> Result<Value> {
        namespace.run(|| {
            let url = format!("{}{path}", self.base);
            let mut response = self
                .agent
                .get(&url)
                .header("authorization", format!("Bearer {}", self.token))
                .call()
                .with_context(|| format!("GET {url}"))?;
            let status = response.status();
            let text = response.body_mut().read_to_string().with_context(|| format!("GET {url}"))?;
            if !status.is_success() {
                bail!("GET {url}: {status}: {text}");
            }
            serde_json::from_str(&text).with_context(|| format!("GET {url}: {text}"))
        })
    }
}
