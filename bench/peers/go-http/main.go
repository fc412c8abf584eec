// Go's own servers, as the documentation of net/http starts with them: a text, or with ROOT http.FileServer.
//
//	go build -o go-http main.go && ./go-http PORT [ROOT]
package main

import (
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: go-http PORT [ROOT]")
	}
	if len(os.Args) > 2 {
		http.Handle("/", http.FileServer(http.Dir(os.Args[2])))
	} else {
		http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			io.WriteString(w, "Hello, World!")
		})
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
