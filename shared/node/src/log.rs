//! What a daemon says: log lines on standard error, and one readable line when it cannot start.

use std::fmt::Display;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// Not a log format.
#[derive(Debug, thiserror::Error)]
#[error("log format {0:?} is neither text nor json")]
pub struct BadFormat(String);

impl FromStr for Format {
    type Err = BadFormat;

    fn from_str(text: &str) -> Result<Format, BadFormat> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            other => Err(BadFormat(other.to_owned())),
        }
    }
}

/// Begins to log on standard error. `RUST_LOG` chooses what is logged; without it, everything from `info` up.
///
/// # Errors
/// If `RUST_LOG` is not a filter, or if the process logs already.
pub fn init(format: Format) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            text.parse::<EnvFilter>().map_err(|error| anyhow::anyhow!("RUST_LOG={text}: {error}"))?
        }
        _ => EnvFilter::new("info"),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Whoever reads the log may end before the daemon does, which is no reason to end: to complain about that on
    // standard error would panic.
    let builder = builder.log_internal_errors(false);
    let result = match format {
        Format::Text => builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    result.map_err(|error| anyhow::anyhow!("cannot log: {error}"))
}

/// Ends the process with one line on standard error and exit code 2: what it was started with cannot work.
pub fn die(error: impl Display) -> ! {
    // `{:#}` prints an `anyhow::Error` with its causes, on one line; a cause may itself have several.
    let line = format!("{error:#}").lines().map(str::trim).collect::<Vec<_>>().join(" ");
    // Nothing is left to do if standard error is closed.
    let _closed = writeln!(io::stderr(), "error: {line}");
    std::process::exit(2)
}

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("token file {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It holds no token.
    #[error("token file {}: holds no token (one line of printable ASCII without spaces)", .0.display())]
    Empty(PathBuf),
}

/// Reads a bearer token: the file's text without white space around it.
///
/// # Errors
/// [`TokenError`], which names the file and never the token.
pub fn read_token(path: &Path) -> Result<String, TokenError> {
    let text = fs::read_to_string(path).map_err(|error| TokenError::Read { path: path.to_owned(), error })?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(TokenError::Empty(path.to_owned()));
    }
    Ok(token.to_owned())
}

/// An error and what caused it, on one line.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Transparent errors repeat their source.
        if !line.ends_with(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_printable_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(read_token(&path), Err(TokenError::Read { .. })));
        for (text, token) in [("s3cret\n", Some("s3cret")), ("", None), ("two words", None), ("tö", None)] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_token(&path).ok().as_deref(), token, "{text:?}");
        }
    }
}
