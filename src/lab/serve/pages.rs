//! What the parts of the sample application say: facts, reviews, stars, and the page made of them.

use std::fmt::Write;

use serde_json::{Value, json};

/// What `details` knows about the book.
pub fn details() -> Value {
    json!({
        "id": 0, "author": "William Shakespeare", "year": 1595, "type": "paperback", "pages": 200,
        "publisher": "PublisherA", "language": "English", "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890"
    })
}

/// Stars by reviewer.
pub fn ratings() -> Value {
    json!({"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}})
}

/// Reviews with their stars, or without where `ratings` did not answer.
pub fn reviews(ratings: Result<&Value, &String>) -> Value {
    let texts = [
        (
            "Reviewer1",
            "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!",
        ),
        (
            "Reviewer2",
            "Absolutely fun and entertaining. The play lacks thematic depth when compared to others.",
        ),
    ];
    let reviews: Vec<Value> = texts
        .iter()
        .map(|(reviewer, text)| {
            let rating = match ratings {
                Ok(ratings) => json!({"stars": ratings["ratings"][reviewer], "color": "black"}),
                Err(reason) => json!({"error": reason}),
            };
            json!({"reviewer": reviewer, "text": text, "rating": rating})
        })
        .collect();
    json!({"id": "0", "reviews": reviews})
}

/// The page; a part that did not answer is replaced by the reason.
pub fn product_page(details: Result<&Value, &String>, reviews: Result<&Value, &String>) -> String {
    let mut page = String::from(
        "<!DOCTYPE html>\n<html>\n<head><title>Simple Bookstore App</title></head>\n<body>\n\
         <h1>The Comedy of Errors</h1>\n",
    );
    page.push_str("<h2>Book Details</h2>\n");
    match details {
        Ok(details) => {
            page.push_str("<dl>\n");
            for (name, value) in details.as_object().into_iter().flatten() {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                let _ = writeln!(page, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(&value));
            }
            page.push_str("</dl>\n");
        }
        Err(reason) => missing(&mut page, "product details", reason),
    }
    page.push_str("<h2>Book Reviews</h2>\n");
    match reviews {
        Ok(reviews) => {
            for review in reviews["reviews"].as_array().into_iter().flatten() {
                let text = review["text"].as_str().unwrap_or_default();
                let reviewer = review["reviewer"].as_str().unwrap_or_default();
                let stars = match review["rating"]["stars"].as_u64() {
                    Some(stars) => "*".repeat(stars.min(5) as usize),
                    None => "ratings are currently unavailable".to_owned(),
                };
                let _ = writeln!(
                    page,
                    "<blockquote>{} <cite>{}</cite> <b>{stars}</b></blockquote>",
                    escape(text),
                    escape(reviewer)
                );
            }
        }
        Err(reason) => missing(&mut page, "product reviews", reason),
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn missing(page: &mut String, what: &str, reason: &str) {
    let _ = writeln!(
        page,
        "<p class=\"error\">Sorry, {what} are currently unavailable for this book. <!-- {} --></p>",
        escape(reason)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_details_reviews_and_stars() {
        let reviews = reviews(Ok(&ratings()));
        let page = product_page(Ok(&details()), Ok(&reviews));
        assert!(page.contains("<dd>William Shakespeare</dd>"));
        assert!(page.contains("<cite>Reviewer2</cite> <b>****</b>"));
        assert!(!page.contains("unavailable"));
    }

    #[test]
    fn a_part_that_fails_is_replaced_by_its_reason() {
        let reason = "connect: <refused>".to_owned();
        let reviews = reviews(Err(&reason));
        let page = product_page(Err(&reason), Ok(&reviews));
        assert!(page.contains("product details are currently unavailable"));
        assert!(page.contains("&lt;refused&gt;"));
        assert!(page.contains("ratings are currently unavailable"));
    }
}
