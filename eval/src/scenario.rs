//! The demo's scenario: live connections and a stream of short requests, while everything around them changes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use daisy_tests::topology::WEB;
use daisy_tests::{EchoClient, EchoOptions, Requests, Topology};
use serde_json::Value;

use crate::report::{Moment, Run, Step};

/// How the scenario is played.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Long-lived connections that keep talking.
    pub connections: usize,
    /// Short HTTP requests in a second.
    pub requests_per_second: u32,
    /// How long the traffic is watched after each change.
    pub hold: Duration,
    /// Whether agents send packets on along the chain.
    pub chaining: bool,
}

/// How often the state is sampled and shown.
const SAMPLE: Duration = Duration::from_millis(500);
/// How long closing windows are waited for at the end.
const CLOSING: Duration = Duration::from_secs(30);
/// How long the router goes on sending to a dead mux: what a routing daemon takes to notice.
const DETECTION: Duration = Duration::from_millis(100);

/// Plays the scenario. `show` gets a line whenever there is something to tell.
///
/// # Errors
/// If something does not start or does not answer. Connections that break are no error: they are counted.
pub fn play(settings: &Settings, show: &mut dyn FnMut(&str)) -> Result<Run> {
    let name = if settings.chaining { "demo" } else { "demo-without" };
    show("network: 1 client, ECMP router, 2 muxes, 4 backends, 1 controller");
    let mut net = Topology::new(name).muxes(2).backends(4).spares(2).chaining(settings.chaining).start()?;
    net.wait_for("the windows of the first enrolments are closed", CLOSING, |net| {
        open_windows(net).map(|n| n == 0)
    })?;
    let options = EchoOptions { connections: settings.connections, ..EchoOptions::default() };
    let mut echo = net.echo(0, &options)?;
    // Without chaining nothing has moved yet: all connections open either way.
    echo.wait_live(settings.connections)?;
    let requests = net.requests(0, WEB, settings.requests_per_second)?;
    let mut stage = Stage::new(net, echo, requests, settings.hold, show);
    stage.run.connections = settings.connections as u64;

    stage.step("all at rest", |_, _| Ok(0))?;
    stage.step("scale out: add b5 and b6", |net, _| {
        let mut moved_buckets = 0;
        for backend in ["b5", "b6"] {
            for service in ["echo", "web"] {
                moved_buckets += moved(&net.enrol_in(service, backend, 100)?);
            }
        }
        Ok(moved_buckets)
    })?;
    stage.step("drain b1", |net, _| Ok(moved(&net.drain("b1")?)))?;
    stage.step("weights: b2 to 300, b3 to 50", |net, _| {
        let mut moved_buckets = 0;
        for (backend, weight) in [("b2", "300"), ("b3", "50")] {
            for service in ["echo", "web"] {
                moved_buckets += moved(&net.daisyctl(&["backend", "weight", service, backend, weight])?);
            }
        }
        Ok(moved_buckets)
    })?;
    stage.step("drain b4, chains grow deeper", |net, _| Ok(moved(&net.drain("b4")?)))?;
    stage.step("kill mux m1", |net, _| net.kill_mux("m1", DETECTION).map(|()| 0))?;
    stage.step("add mux m3", |net, _| net.add_mux().map(|_| 0))?;
    stage.step("kill and restart the controller", |net, _| {
        net.kill_controller();
        net.start_controller()?;
        Ok(0)
    })?;
    stage.step("half of the clients leave", |_, echo| {
        echo.command(&format!("close {}", settings.connections / 2)).map(|()| 0)
    })?;
    stage.finish(settings.chaining)
}

/// Buckets with previous owners, of both services.
fn open_windows(net: &Topology) -> Result<u64> {
    Ok(u64::from(net.service("echo")?.open_windows) + u64::from(net.service("web")?.open_windows))
}

/// The sum of all `moved_buckets` in an answer of the controller, which may speak of several services.
fn moved(answer: &Value) -> u64 {
    match answer {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| match (name.as_str(), value.as_u64()) {
                ("moved_buckets", Some(count)) => count,
                _ => moved(value),
            })
            .sum(),
        Value::Array(items) => items.iter().map(moved).sum(),
        _ => 0,
    }
}

/// The network with its traffic, and what has been seen of it.
struct Stage<'a> {
    net: Topology,
    echo: EchoClient,
    requests: Requests,
    hold: Duration,
    show: &'a mut dyn FnMut(&str),
    began: Instant,
    run: Run,
}

impl Stage<'_> {
    fn new(
        net: Topology,
        echo: EchoClient,
        requests: Requests,
        hold: Duration,
        show: &mut dyn FnMut(&str),
    ) -> Stage<'_> {
        Stage { net, echo, requests, hold, show, began: Instant::now(), run: Run::default() }
    }

    /// Changes something and watches what becomes of the traffic.
    fn step(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut Topology, &mut EchoClient) -> Result<u64>,
    ) -> Result<()> {
        let before = self.begin(name);
        let moved_buckets = change(&mut self.net, &mut self.echo).with_context(|| name.to_owned())?;
        let end = Instant::now() + self.hold;
        while Instant::now() < end {
            self.look()?;
        }
        self.end(name, before, moved_buckets);
        Ok(())
    }

    fn begin(&mut self, name: &str) -> Moment {
        self.run.marks.push((self.began.elapsed().as_secs_f64(), name.to_owned()));
        (self.show)(&format!("-- {name}"));
        self.last()
    }

    fn end(&mut self, name: &str, before: Moment, moved_buckets: u64) {
        let now = self.last();
        self.run.steps.push(Step {
            name: name.to_owned(),
            moved_buckets,
            open_windows: now.open_windows,
            chained_packets: now.chained_packets - before.chained_packets,
            broken: now.broken - before.broken,
        });
    }

    fn last(&self) -> Moment {
        let nothing = Moment { at_s: 0.0, live: 0, broken: 0, chained_packets: 0, open_windows: 0 };
        self.run.moments.last().copied().unwrap_or(nothing)
    }

    /// Waits for the next sample, notes and shows it.
    fn look(&mut self) -> Result<()> {
        std::thread::sleep(SAMPLE);
        self.net.check()?;
        let sample = self.echo.latest();
        let totals = self.requests.latest();
        let last = self.last();
        // While the controller is away its figures stand still.
        let (chained_packets, open_windows) =
            self.figures().unwrap_or((last.chained_packets, last.open_windows));
        let moment = Moment {
            at_s: self.began.elapsed().as_secs_f64(),
            live: sample.live as u64,
            broken: sample.broken as u64 + totals.failed,
            chained_packets: chained_packets.max(last.chained_packets),
            open_windows,
        };
        self.run.moments.push(moment);
        (self.show)(&format!(
            "   {:>5.1} s  {:>5} live  {:>4} broken  {:>6} requests  {:>5} open windows  {:>7} chained packets",
            moment.at_s, moment.live, moment.broken, totals.ok, moment.open_windows, moment.chained_packets
        ));
        Ok(())
    }

    /// Packets that agents sent on, and buckets with previous owners.
    fn figures(&self) -> Result<(u64, u64)> {
        let nodes = self.net.nodes()?;
        let chained = nodes.iter().map(|node| node.counter("sent_on") + node.counter("returned")).sum();
        Ok((chained, open_windows(&self.net)?))
    }

    /// All clients leave. Windows close by themselves; not without chaining, where backends are left with
    /// connections whose clients were reset by somebody else.
    fn finish(mut self, windows_close: bool) -> Result<Run> {
        let name = "all clients leave, windows close";
        let before = self.begin(name);
        self.echo.command("close all")?;
        let end = Instant::now() + CLOSING;
        self.look()?;
        while (self.last().live > 0 || windows_close && self.last().open_windows > 0) && Instant::now() < end
        {
            self.look()?;
        }
        self.end(name, before, 0);

        let totals = self.requests.finish()?;
        let report = self.echo.finish()?;
        self.run.requests = totals.ok;
        self.run.stalls = report.stalls;
        self.run.broken = report.broken as u64 + totals.failed;
        for line in totals.errors.iter().take(3) {
            (self.show)(&format!("   failed request: {line}"));
        }
        if report.broken > 0 {
            (self.show)(&format!("   {}", report.summary()));
        }
        Ok(self.run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn moves_of_all_services_count() {
        let answer = json!([
            {"changed": true, "plan": {"moved_buckets": 3, "per_backend": {"b1": 3}}},
            {"changed": true, "plan": {"moved_buckets": 4}}
        ]);
        assert_eq!(moved(&answer), 7);
        assert_eq!(moved(&json!({"changed": false})), 0);
    }
}
