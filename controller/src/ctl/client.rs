//! The HTTP client of `daisyctl`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use ureq::http::{Request, header};

use crate::problem::Problem;

/// Speaks with one controller.
pub struct Client {
    agent: ureq::Agent,
    base: String,
    token: Option<String>,
}

impl Client {
    /// For the controller at this URL.
    ///
    /// # Errors
    /// If the URL is not `http://…`, or the token file cannot be read.
    pub fn new(controller: &str, token_file: Option<&Path>) -> anyhow::Result<Client> {
        if !controller.starts_with("http://") {
            bail!("controller {controller:?}: not an http:// URL");
        }
        let read = |path: &Path| {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("token file {}", path.display()))?;
            let token = text.trim();
            if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                bail!("token file {}: not one word of visible ASCII", path.display());
            }
            anyhow::Ok(token.to_owned())
        };
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)))
            .proxy(None)
            .build();
        let base = controller.trim_end_matches('/').to_owned();
        Ok(Client { agent: config.into(), base, token: token_file.map(read).transpose()? })
    }

    /// One request; the answer's JSON.
    ///
    /// # Errors
    /// One readable line: nobody answers, or the controller's own words.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let at = || format!("controller {}", self.base);
        let answer = match body {
            Some(body) => {
                let request = request.header(header::CONTENT_TYPE, "application/json");
                self.agent.run(request.body(body.to_string()).with_context(at)?)
            }
            None => self.agent.run(request.body(()).with_context(at)?),
        };
        let mut answer = answer.with_context(at)?;
        let status = answer.status();
        let text = answer.body_mut().with_config().limit(1 << 30).read_to_string().with_context(at)?;
        if status.is_success() {
            return serde_json::from_str(&text).with_context(at);
        }
        match serde_json::from_str::<Problem>(&text) {
            Ok(problem) => bail!("{problem}"),
            Err(_) => bail!("controller {}: {status}", self.base),
        }
    }
}
