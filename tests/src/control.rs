//! What a test says to a running topology: to its controller, to its clients, and what it waits for.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::echo::report::ServerReport;
use crate::netns;
use crate::node::{BackendView, NodeView, ServiceView};
use crate::process::Process;
use crate::topology::{CONTROLLER_ADDRESS, CONTROLLER_PORT, PATIENCE, Topology, log_filter};
use crate::traffic::{EchoClient, EchoOptions, Requests};

impl Topology {
    // ---- controller ----------------------------------------------------------------------------------------

    /// Starts (again) the controller, with the same store.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_controller(&mut self) -> Result<()> {
        let mut command = Command::new(self.binary("daisy-controller")?);
        command
            .args(["--listen", &format!("{CONTROLLER_ADDRESS}:{CONTROLLER_PORT}")])
            .arg("--store")
            .arg(self.directory.join("controller.redb"))
            .args(["--lease-ms", &self.builder.lease_ms.to_string()])
            .arg("--token-file")
            .arg(&self.token_file)
            .env("RUST_LOG", log_filter());
        let log = self.log("controller");
        let namespace = &self.controller.namespace;
        let process =
            self.controller.process.insert(Process::start("controller", namespace, command, &log, false)?);
        process.wait_for_line("ready", PATIENCE)
    }

    /// Kills the controller with SIGKILL.
    pub fn kill_controller(&mut self) {
        self.controller.process = None;
    }

    /// Stops the controller with SIGTERM.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn stop_controller(&mut self) -> Result<()> {
        match self.controller.process.take() {
            Some(mut process) => process.stop(),
            None => Ok(()),
        }
    }

    /// Asks the API.
    ///
    /// # Errors
    /// If the controller does not answer, or refuses.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.api.get(&self.controller.namespace, path)
    }

    fn get_as<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let value = self.get(path)?;
        serde_json::from_value(value.clone()).with_context(|| format!("GET {path}: {value}"))
    }

    /// Runs `daisyctl` on the controller's host, and returns its JSON.
    ///
    /// # Errors
    /// If it fails.
    pub fn daisyctl(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(self.binary("daisyctl")?);
        command
            .args(["--controller", self.api.base(), "--output", "json", "--token-file"])
            .arg(&self.token_file)
            .args(arguments);
        let text = self
            .controller
            .namespace
            .run(|| netns::run(&mut command, None))
            .with_context(|| format!("daisyctl {}", arguments.join(" ")))?;
        serde_json::from_str(&text).with_context(|| format!("daisyctl {}: {text}", arguments.join(" ")))
    }

    /// Adds a service and routes its address to the muxes.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn add_service(&mut self, name: &str, address: SocketAddr, buckets: u32) -> Result<()> {
        let (vip, port) = (address.ip().to_string(), address.port().to_string());
        let encapsulation = self.builder.encapsulation.to_string();
        self.daisyctl(&[
            "service",
            "add",
            name,
            "--vip",
            &vip,
            "--port",
            &port,
            "--buckets",
            &buckets.to_string(),
            "--encapsulation",
            &encapsulation,
        ])?;
        if let std::net::IpAddr::V4(vip) = address.ip()
            && !self.vips.contains(&vip)
        {
            self.vips.push(vip);
            self.route()?;
        }
        Ok(())
    }

    /// Adds a backend to `echo` and `web`.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn enrol(&self, name: &str, weight: u32) -> Result<()> {
        for service in ["echo", "web"] {
            self.enrol_in(service, name, weight)?;
        }
        Ok(())
    }

    /// Adds a backend to a service.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn enrol_in(&self, service: &str, name: &str, weight: u32) -> Result<Value> {
        let (_, address) = self.host(name)?;
        let (address, weight) = (address.to_string(), weight.to_string());
        self.daisyctl(&["backend", "add", service, name, "--address", &address, "--weight", &weight])
    }

    /// Changes a backend's weight in `echo` and `web`.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn set_weight(&self, name: &str, weight: u32) -> Result<()> {
        for service in ["echo", "web"] {
            self.daisyctl(&["backend", "weight", service, name, &weight.to_string()])?;
        }
        Ok(())
    }

    /// Drains a backend of all its services.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn drain(&self, name: &str) -> Result<Value> {
        self.daisyctl(&["backend", "drain", name])
    }

    /// Ends a drain.
    ///
    /// # Errors
    /// If the controller refuses.
    pub fn undrain(&self, name: &str) -> Result<Value> {
        self.daisyctl(&["backend", "undrain", name])
    }

    /// A service.
    ///
    /// # Errors
    /// If the controller does not answer.
    pub fn service(&self, name: &str) -> Result<ServiceView> {
        self.get_as(&format!("/v1/services/{name}"))
    }

    /// All nodes.
    ///
    /// # Errors
    /// If the controller does not answer.
    pub fn nodes(&self) -> Result<Vec<NodeView>> {
        self.get_as("/v1/nodes")
    }

    /// A node.
    ///
    /// # Errors
    /// If the controller does not answer, or does not know it.
    pub fn node(&self, name: &str) -> Result<NodeView> {
        let nodes = self.nodes()?;
        nodes
            .into_iter()
            .find(|n| n.name == name)
            .with_context(|| format!("the controller knows no node {name}"))
    }

    // ---- waiting -------------------------------------------------------------------------------------------

    /// Asks again and again until `wanted` says yes. An error counts as no: what is waited for may be the daemon
    /// that has to answer.
    ///
    /// # Errors
    /// If that takes longer than `limit`, with the last answer; if a daemon that should run has ended.
    pub fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Topology) -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let answer = wanted(self);
            if let Ok(true) = answer {
                return Ok(());
            }
            self.check()?;
            if Instant::now() >= end {
                let last = match answer {
                    Err(error) => format!("{error:#}"),
                    Ok(_) => self.get("/v1/status").map_or_else(|e| format!("{e:#}"), |v| v.to_string()),
                };
                bail!("waited {limit:?} for this: {what}; the last answer is: {last}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// # Errors
    /// If a daemon or server that should run has ended.
    pub fn check(&mut self) -> Result<()> {
        let muxes = self.muxes.iter_mut().filter_map(|m| m.process.as_mut());
        let backends = self
            .backends
            .iter_mut()
            .flat_map(|b| b.agent.iter_mut().chain(b.echo.iter_mut()).chain(b.servers.iter_mut()));
        for process in self.controller.process.iter_mut().chain(muxes).chain(backends) {
            process.check()?;
        }
        Ok(())
    }

    /// Waits until every mux that runs, and every agent that runs and whose backend is in a service, is live and
    /// has applied the newest tables; nodes that are cut off from the controller excepted.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_settled(&mut self) -> Result<()> {
        let muxes = self.muxes.iter().filter(|m| m.process.is_some()).map(|m| m.name.clone());
        let agents = self.backends.iter().filter(|b| b.agent.is_some()).map(|b| b.name.clone());
        let (muxes, agents): (Vec<String>, Vec<String>) = (muxes.collect(), agents.collect());
        self.wait_for("every node is live and up to date", PATIENCE, |net| {
            let nodes = net.nodes()?;
            let backends: Vec<BackendView> = net.get_as("/v1/backends")?;
            let serving = agents.iter().filter(|name| backends.iter().any(|backend| backend.name == **name));
            for name in muxes.iter().chain(serving).filter(|name| !net.cut.contains(name)) {
                match nodes.iter().find(|node| node.name == *name) {
                    Some(node) if node.is_settled() => {}
                    Some(node) => bail!("{name}: lease {}, behind {}", node.lease, node.behind),
                    None => bail!("{name} has not been heard of"),
                }
            }
            Ok(true)
        })
    }

    /// Waits until one node is live and has applied the newest tables.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_node_settled(&mut self, name: &str) -> Result<()> {
        self.wait_for(&format!("{name} is live and up to date"), PATIENCE, |net| {
            Ok(net.node(name)?.is_settled())
        })
    }

    /// Waits until no bucket of a service has a previous owner any more.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_windows_closed(&mut self, service: &str) -> Result<()> {
        self.wait_for(&format!("all windows of {service} are closed"), PATIENCE, |net| {
            let view = net.service(service)?;
            if view.open_windows > 0 {
                bail!("{} windows of {service} are open: {:?}", view.open_windows, view.backends);
            }
            Ok(true)
        })
    }

    /// Waits until no table changes any more: windows without connections have closed. That is so when nothing
    /// has changed for three seconds; agents look for drained buckets every second.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_still(&mut self) -> Result<()> {
        let (mut since, mut last) = (Instant::now(), Vec::new());
        self.wait_for("tables have not changed for three seconds", PATIENCE, |net| {
            let services: Vec<ServiceView> = net.get_as("/v1/services")?;
            let generations: Vec<u32> = services.iter().map(|service| service.generation).collect();
            if generations != last {
                (since, last) = (Instant::now(), generations);
            }
            Ok(since.elapsed() > Duration::from_secs(3))
        })
    }

    /// Waits until a backend of a service is in this state.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_state(&mut self, service: &str, backend: &str, state: &str) -> Result<()> {
        self.wait_for(&format!("{backend} is {state} in {service}"), PATIENCE, |net| {
            let view = net.service(service)?;
            let found = view.backend(backend)?;
            if found.state != state {
                bail!("{found:?}");
            }
            Ok(true)
        })
    }

    /// Waits until the counters of all live nodes account for every packet that came in: traffic must have
    /// stopped. Returns the nodes.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_conserved(&mut self) -> Result<Vec<NodeView>> {
        let mut last: Vec<NodeView> = Vec::new();
        self.wait_for("every packet is accounted for, and none is under way", PATIENCE, |net| {
            let nodes: Vec<NodeView> = net.nodes()?.into_iter().filter(|node| node.lease == "live").collect();
            let counters = |nodes: &[NodeView]| nodes.iter().map(|n| n.counters.clone()).collect::<Vec<_>>();
            // Nodes send their counters when they sync: at different times, and with pauses.
            let same = counters(&nodes) == counters(&last);
            last = nodes;
            for node in &last {
                let (received, accounted) = node.conservation();
                if received != accounted {
                    bail!(
                        "{}: received {received}, accounted for {accounted}: {:?}",
                        node.name,
                        node.counters
                    );
                }
            }
            let sum = |kind: &str, ways: &[&str]| -> u64 {
                last.iter()
                    .filter(|node| node.kind == kind)
                    .map(|node| ways.iter().map(|way| node.counter(way)).sum::<u64>())
                    .sum()
            };
            let sent = sum("mux", &["sent"]) + sum("agent", &["sent_on", "returned"]);
            let received = sum("agent", &["received"]) - sum("agent", &["probes_answered"]);
            // What an XDP program has sent and the device had no room for, only the device counts.
            let overrun = net.muxes.iter().map(|mux| xdp_overrun(&mux.namespace)).sum::<Result<u64>>()?;
            if sent != received + overrun {
                bail!(
                    "{sent} encapsulated packets were sent, agents received {received}, and devices had no room for \
                     {overrun}"
                );
            }
            Ok(same)
        })?;
        Ok(last)
    }

    // ---- traffic -------------------------------------------------------------------------------------------

    /// Starts an echo client on a client's host.
    ///
    /// # Errors
    /// If it does not start.
    pub fn echo(&self, client: usize, options: &EchoOptions) -> Result<EchoClient> {
        let host = self.client(client);
        let log = self.log(&format!("{}-echo-client", host.name));
        EchoClient::start(&host.namespace, &self.binary("daisy-echo")?, options, &log)
    }

    /// Starts a stream of short HTTP requests on a client's host.
    ///
    /// # Errors
    /// If it does not start.
    pub fn requests(&self, client: usize, target: SocketAddr, per_second: u32) -> Result<Requests> {
        let host = self.client(client);
        let log = self.log(&format!("{}-requests", host.name));
        Requests::start(&host.namespace, &self.binary("daisy-echo")?, target, per_second, &log)
    }

    /// Ends a backend's echo server in order and returns what it did.
    ///
    /// # Errors
    /// If it does not end well, or prints no report.
    pub fn echo_server_report(&mut self, name: &str) -> Result<ServerReport> {
        let mut server =
            self.backend(name)?.echo.take().with_context(|| format!("{name} runs no echo server"))?;
        server.stop()?;
        let text = server.output()?;
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("the echo server of {name} ended with: {line}"))
    }

    /// Says that the run failed: logs are shown, and kept. A panic says so by itself.
    pub fn fail(&mut self) {
        self.failed = true;
    }
}

/// How many packets that an XDP program sent back a host's device had no room for.
fn xdp_overrun(host: &netns::Namespace) -> Result<u64> {
    let text = host.output("ethtool", &["-S", "eth0"])?;
    let errors = text.lines().filter_map(|line| line.trim().split_once(": "));
    errors
        .filter(|(name, _)| name.ends_with("xdp_tx_errors"))
        .map(|(name, count)| count.parse::<u64>().with_context(|| format!("{name} is {count:?}")))
        .sum()
}
