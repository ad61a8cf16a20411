{{/* The rules that network policies are made of. Ports are the pods' own, whatever those of the Services. */}}

{{/* A port of TCP. */}}
{{- define "superlink.policyPort" -}}
- protocol: TCP
  port: {{ . }}
{{- end -}}

{{/* Pods of this release, each of a component: (list $ "enrolment" "superexec"). */}}
{{- define "superlink.policyPeers" -}}
{{- $ := index . 0 -}}
{{- range rest . -}}
- podSelector:
    matchLabels:
      {{- include "superlink.selector" (list $ .) | nindent 6 }}
{{ end -}}
{{- end -}}

{{- define "superlink.policyMonitoring" -}}
- namespaceSelector: {{ toJson .Values.networkPolicy.monitoring.namespaceSelector }}
  podSelector: {{ toJson .Values.networkPolicy.monitoring.podSelector }}
{{- end -}}

{{/* Who may reach a server that sites talk to: (list $ 9092 "enrolment" "superexec") are port and own components. */}}
{{- define "superlink.policySites" -}}
{{- $ := index . 0 -}}
{{- $components := rest (rest .) -}}
- ports:
    {{- include "superlink.policyPort" (index . 1) | nindent 4 }}
  {{- with $.Values.networkPolicy.siteCidrs }}
  from:
    {{- range . }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
    {{- include "superlink.policyPeers" (prepend $components $) | trim | nindent 4 }}
    {{- include "superlink.policyMonitoring" $ | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "superlink.policyDns" -}}
- to:
    - namespaceSelector: {{ toJson .Values.networkPolicy.dns.namespaceSelector }}
      podSelector: {{ toJson .Values.networkPolicy.dns.podSelector }}
  ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
{{- end -}}

{{- define "superlink.policyApiServer" -}}
{{- $given := .Values.networkPolicy.apiServer -}}
- ports:
    {{- range $given.ports }}
    {{- include "superlink.policyPort" . | nindent 4 }}
    {{- end }}
  {{- with $given.cidrs }}
  to:
    {{- range . }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  {{- end }}
{{- end -}}

{{- define "superlink.policyHub" -}}
- ports:
    {{- include "superlink.policyPort" 443 | nindent 4 }}
  to:
    {{- range .Values.networkPolicy.hubCidrs }}
    - ipBlock:
        cidr: {{ . }}
    {{- else }}
    - ipBlock:
        cidr: 0.0.0.0/0
        except: [10.0.0.0/8, 100.64.0.0/10, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16]
    - ipBlock:
        cidr: ::/0
        except: ["fc00::/7", "fe80::/10"]
    {{- end }}
{{- end -}}
