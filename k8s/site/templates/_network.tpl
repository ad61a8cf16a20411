{{/* Where pods may connect to: one rule of egress each. */}}

{{/* The federation's two servers; at any address where none is named. */}}
{{- define "site.toFederation" -}}
- ports:
    {{- range compact (list .Values.superlink .Values.enrolment) }}
    - {port: {{ include "site.port" . }}, protocol: TCP}
    {{- end }}
  {{- include "site.toAddresses" .Values.networkPolicy.superlinkCidrs | nindent 2 }}
{{- end }}

{{- define "site.toSuperNode" -}}
- ports:
    - {port: 9094, protocol: TCP}
  to:
    - podSelector:
        matchLabels:
          {{- include "site.selector" (list . "supernode") | nindent 10 }}
      {{- if include "site.podPerTask" . }}
      {{- include "site.namespaceSelector" .Release.Namespace | nindent 6 }}
      {{- end }}
{{- end }}

{{- define "site.toApiServer" -}}
- ports:
    {{- range .Values.networkPolicy.apiServer.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- include "site.toAddresses" .Values.networkPolicy.apiServer.cidrs | nindent 2 }}
{{- end }}

{{- define "site.toDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
  to:
    - namespaceSelector:
        {{- toYaml .Values.networkPolicy.dns.namespaceSelector | nindent 8 }}
      podSelector:
        {{- toYaml .Values.networkPolicy.dns.podSelector | nindent 8 }}
{{- end }}

{{/* The internet without the private networks of RFC 1918, 4193 and 6598 and the link-local ones, or what is named. */}}
{{- define "site.toHub" -}}
- ports:
    - {port: 443, protocol: TCP}
  {{- with .Values.networkPolicy.hubCidrs }}
  {{- include "site.toAddresses" . | nindent 2 }}
  {{- else }}
  to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: [10.0.0.0/8, 100.64.0.0/10, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16]
    - ipBlock:
        cidr: "::/0"
        except: ["fc00::/7", "fe80::/10"]
  {{- end }}
{{- end }}

{{- define "site.toAddresses" -}}
{{- with . -}}
to:
  {{- range . }}
  - ipBlock:
      cidr: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A namespace by its name, which Kubernetes notes in this label. */}}
{{- define "site.namespaceSelector" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ . }}
{{- end }}
