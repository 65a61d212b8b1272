//! Why a request was refused, as RFC 9457 `application/problem+json`.

use std::fmt;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Problem(Box<Details>);

/// The members of a problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Details {
    /// The kind of problem. `about:blank`: the status says it all.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// One readable line that names the field and the value.
    pub detail: String,
    /// The field at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What it held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
}

impl Problem {
    /// A problem that no field is to blame for.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Problem {
        Problem(Box::new(Details {
            kind: "about:blank".into(),
            title: status.canonical_reason().unwrap_or("Error").into(),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            value: None,
        }))
    }

    /// Its members.
    pub fn details(&self) -> &Details {
        &self.0
    }

    /// A field holds what it cannot: 422.
    pub fn field(field: &str, value: impl Serialize, why: impl fmt::Display) -> Problem {
        Problem::at(StatusCode::UNPROCESSABLE_ENTITY, field, value, why)
    }

    /// What a field asks for contradicts the state: 409.
    pub fn conflict(field: &str, value: impl Serialize, why: impl fmt::Display) -> Problem {
        Problem::at(StatusCode::CONFLICT, field, value, why)
    }

    /// What a field names does not exist: 404.
    pub fn not_found(field: &str, value: impl Serialize, why: impl fmt::Display) -> Problem {
        Problem::at(StatusCode::NOT_FOUND, field, value, why)
    }

    fn at(status: StatusCode, field: &str, value: impl Serialize, why: impl fmt::Display) -> Problem {
        let value = serde_json::to_value(value).unwrap_or(Value::Null);
        let shown = match &value {
            Value::String(text) => format!("{text:?}"),
            other => other.to_string(),
        };
        let mut problem = Problem::new(status, format!("{field} {shown}: {why}"));
        problem.0.field = Some(field.into());
        problem.0.value = Some(value);
        problem
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl std::error::Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}
