//! The sample application: a book page whose parts are separate services, and a gateway in front of it.

mod http;
mod pages;

use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use http::{Reply, Request};

use super::listen;

/// What one process of the sample application does.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// The part to play
    #[arg(value_enum)]
    role: Role,
    /// The port to listen on
    #[arg(long, default_value_t = 9080)]
    port: u16,
    /// Where productpage finds details
    #[arg(long, default_value = "http://details:9080")]
    details: String,
    /// Where productpage finds reviews
    #[arg(long, default_value = "http://reviews:9080")]
    reviews: String,
    /// Where reviews finds ratings
    #[arg(long, default_value = "http://ratings:9080")]
    ratings: String,
    /// Where the gateway sends what it receives
    #[arg(long, default_value = "http://productpage.bookinfo:9080")]
    upstream: String,
    /// How long to wait for another service, in seconds
    #[arg(long, default_value_t = 5)]
    timeout: u64,
}

/// The parts of the sample application.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The page, built from details and reviews
    Productpage,
    /// Facts about the book
    Details,
    /// What readers wrote, with stars from ratings
    Reviews,
    /// Stars
    Ratings,
    /// Passes every request on to the upstream
    Gateway,
}

/// Serves until the process is told to stop.
///
/// # Errors
/// When the port cannot be listened on.
pub fn run(arguments: ServeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let port = arguments.port;
    let listener =
        listen::everywhere(port).with_context(|| format!("cannot listen on port {port}"))?;
    listener.set_nonblocking(true)?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        println!("{:?} listens on port {port}", arguments.role);
        let part = Rc::new(Part { arguments });
        http::serve(listener, move |request| {
            let part = Rc::clone(&part);
            async move { part.answer(request).await }
        })
        .await
    })
}

struct Part {
    arguments: ServeArgs,
}

impl Part {
    async fn answer(&self, request: Request) -> Reply {
        if self.arguments.role == Role::Gateway {
            return self.pass_on(&request).await;
        }
        let path = request.path.split('?').next().unwrap_or_default();
        match (self.arguments.role, path) {
            (_, "/health") => Reply::text(200, "healthy\n"),
            (Role::Productpage, "/" | "/productpage") => self.product_page().await,
            (Role::Details, p) if p.starts_with("/details") => Reply::json(pages::details()),
            (Role::Ratings, p) if p.starts_with("/ratings") => Reply::json(pages::ratings()),
            (Role::Reviews, p) if p.starts_with("/reviews") => self.reviews().await,
            _ => Reply::text(404, "no such page\n"),
        }
    }

    async fn product_page(&self) -> Reply {
        let (details, reviews) = tokio::join!(
            self.fetch(&self.arguments.details, "/details/0"),
            self.fetch(&self.arguments.reviews, "/reviews/0"),
        );
        Reply::html(pages::product_page(details.as_ref(), reviews.as_ref()))
    }

    async fn reviews(&self) -> Reply {
        let ratings = self.fetch(&self.arguments.ratings, "/ratings/0").await;
        Reply::json(pages::reviews(ratings.as_ref()))
    }

    /// The JSON another service answers, or a sentence why there is none.
    async fn fetch(&self, base: &str, path: &str) -> Result<serde_json::Value, String> {
        let reply = self.get(base, path).await?;
        if reply.status != 200 {
            return Err(format!("{base}{path} answered {}", reply.status));
        }
        serde_json::from_slice(&reply.body).map_err(|e| format!("{base}{path}: {e}"))
    }

    async fn pass_on(&self, request: &Request) -> Reply {
        self.get(&self.arguments.upstream, &request.path)
            .await
            .unwrap_or_else(|reason| Reply::text(503, &format!("{reason}\n")))
    }

    async fn get(&self, base: &str, path: &str) -> Result<Reply, String> {
        let limit = Duration::from_secs(self.arguments.timeout);
        match tokio::time::timeout(limit, http::get(base, path)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(e)) => Err(format!("{base}{path}: {e:#}")),
            Err(_) => Err(format!(
                "{base}{path}: no answer within {}s",
                self.arguments.timeout
            )),
        }
    }
}
