//! What Kubernetes and an autoscaler do in a cluster, for one workload on one machine: pods are
//! started and stopped as the stats server's decision says, and the gateway's endpoints are those
//! that are ready. A pod is an app and an Envoy in front of it.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, wait};
use serde_json::json;
use tokio::task::JoinSet;

/// The largest number of pods.
pub const MOST_PODS: usize = 4;
/// The workload's namespace and name, as the cluster and the pods have them.
pub const KEY: (&str, &str) = ("default", "hello-00001");

/// The largest number of pods that start at the same time: on two cores, more of them would only
/// delay the first.
const MOST_STARTING: usize = 2;
/// How long an app takes to start.
const START_UP: Duration = Duration::from_millis(500);
/// How often the decision is asked for.
const POLL: Duration = Duration::from_millis(100);
/// How long nothing must have been in flight at a pod before it is stopped.
const QUIET: Duration = Duration::from_millis(500);
/// How long a pod may take to drain.
const PATIENCE: Duration = Duration::from_secs(30);

/// The pods by what they are doing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pods {
    pub starting: usize,
    pub ready: usize,
    pub draining: usize,
}

struct Pod {
    app: App,
    envoy: Envoy,
}

/// Keeps as many pods as the stats server wants.
pub struct Kubelet<'a> {
    server: &'a StatServer,
    gateway: SocketAddr,
    endpoints: &'a EndpointFile,
    pods: &'a Mutex<Pods>,
    started: u32,
    starting: JoinSet<Pod>,
    ready: Vec<Pod>,
    draining: JoinSet<()>,
}

impl<'a> Kubelet<'a> {
    /// Returns a kubelet that shows its pods in `pods`, and their endpoints in `endpoints`.
    pub fn new(
        server: &'a StatServer,
        gateway: &Envoy,
        endpoints: &'a EndpointFile,
        pods: &'a Mutex<Pods>,
    ) -> Self {
        Self {
            server,
            gateway: gateway.admin,
            endpoints,
            pods,
            started: 0,
            starting: JoinSet::new(),
            ready: Vec::new(),
            draining: JoinSet::new(),
        }
    }

    /// Starts and stops pods until it is dropped.
    ///
    /// # Panics
    /// If a pod does not start or does not drain.
    pub async fn run(mut self) {
        let mut polls = tokio::time::interval(POLL);
        loop {
            tokio::select! {
                _ = polls.tick() => {
                    let key = self.server.key(KEY.0, KEY.1).await;
                    // Without a decision everything stays as it is.
                    if let Some(desired) = key.and_then(|key| key["desired_pods"].as_u64()) {
                        self.scale_to(usize::try_from(desired).unwrap_or(MOST_PODS).min(MOST_PODS));
                    }
                }
                Some(pod) = self.starting.join_next() => {
                    self.ready.push(pod.expect("a pod"));
                    self.publish();
                }
                Some(ended) = self.draining.join_next() => ended.expect("the end of a pod"),
            }
            *self.pods.lock().expect("no panic under this lock") = Pods {
                starting: self.starting.len(),
                ready: self.ready.len(),
                draining: self.draining.len(),
            };
        }
    }

    fn scale_to(&mut self, desired: usize) {
        while self.ready.len() + self.starting.len() < desired && self.starting.len() < MOST_STARTING {
            self.started += 1;
            self.starting.spawn(start(self.started, self.server.address));
        }
        // Those that start are stopped when they are ready.
        let surplus = self.ready.len().saturating_sub(desired);
        if surplus > 0 {
            let leaving = self.ready.split_off(self.ready.len() - surplus);
            self.publish();
            for pod in leaving {
                self.draining.spawn(stop(pod, self.gateway));
            }
        }
    }

    /// Tells the gateway which pods are ready.
    fn publish(&self) {
        let addresses: Vec<SocketAddr> = self.ready.iter().map(|pod| pod.envoy.address).collect();
        self.endpoints.set(CLUSTER, &addresses);
    }
}

/// Starts a pod. It is ready when its app has started and its Envoy listens.
async fn start(number: u32, server: SocketAddr) -> Pod {
    tokio::time::sleep(START_UP).await;
    let app = App::start().await;
    let mut bootstrap = Bootstrap::sidecar(app.address, server);
    bootstrap.configure("pod", json!(format!("{}-pod-{number}", KEY.1)));
    bootstrap.configure("container_concurrency", json!(10));
    bootstrap.configure("answer_network_probe", json!(true));
    bootstrap.configure("app_cluster", json!("app"));
    // The stats server counts a pod until it has been silent for ten periods.
    bootstrap.configure("reporting_period", json!("250ms"));
    let envoy = Envoy::quiet(Version::Any, &bootstrap, 1).await;
    Pod { app, envoy }
}

/// Stops a pod that is no longer among the endpoints, once the gateway has noticed and nothing is in
/// flight.
async fn stop(mut pod: Pod, gateway: SocketAddr) {
    let endpoint = format!("::{}::", pod.envoy.address);
    wait::until("the gateway no longer has the endpoint", PATIENCE, async || {
        let clusters = http::get(gateway, "/clusters").await?;
        if clusters.contains(&endpoint) { Err(clusters) } else { Ok(()) }
    })
    .await;
    let deadline = Instant::now() + PATIENCE;
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < QUIET {
        let labels = [("envoy_http_conn_manager_prefix", "traffic")];
        let active = pod.envoy.stat("envoy_http_downstream_rq_active", &labels).await;
        if active > 0.0 || pod.app.counts.now() > 0 {
            quiet_since = Instant::now();
        }
        assert!(Instant::now() < deadline, "{active} requests are in flight at a pod that drains");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    pod.envoy.process.signal(libc::SIGTERM);
    while pod.envoy.process.ended().is_none() {
        assert!(Instant::now() < deadline, "an Envoy does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
